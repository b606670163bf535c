import os, sys, time

done, began, told = sys.argv[1], time.monotonic(), 0.0
while not os.path.exists(done):
    waited = time.monotonic() - began
    if waited >= told:
        print(f"waiting for the download Job, {waited:.0f} s so far", flush=True)
        told += 30
    time.sleep(2)
print("the model is there", flush=True)
