"""What all tests share: one torch thread each."""

import os

# Before torch is there: two threads on two busy cores took up to ten times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
