"""What is compared: each arm starts in a process of its own."""
