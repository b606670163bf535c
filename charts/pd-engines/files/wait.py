"""Waits until the download Job has made the file that is its last act."""

import os
import sys
import time

done = sys.argv[1]
began = time.monotonic()
told = 0
while not os.path.exists(done):
    waited = time.monotonic() - began
    if waited >= told:
        print(f"waiting for the download Job, {waited:.0f} s so far", flush=True)
        told += 30
    time.sleep(2)
print("the model is there", flush=True)
