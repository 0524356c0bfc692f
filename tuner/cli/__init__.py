"""The ``tuner`` command: parse, call one function, print."""
