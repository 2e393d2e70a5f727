"""Stands in for launch/train.py in tests: config.seq_len decides what happens.

2 fails with a message, 3 is killed, 10 and more wait until the file "go" exists.
"""

import json
import os
import signal
import sys
import time

signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
folder, seq_len = flags["workdir"], int(flags["config.seq_len"])
os.makedirs(folder, exist_ok=True)
with open(f"{folder}/cores", "w") as file:
    json.dump(sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else [], file)
if seq_len == 2:
    print("fake_train.py: error: a bad day")
    sys.exit(1)
if seq_len == 3:
    os.kill(os.getpid(), signal.SIGKILL)
while seq_len > 9 and not os.path.exists(f"{folder}/../go"):
    time.sleep(0.01)
with open(f"{folder}/config.json", "w") as file:
    json.dump({"versions": {"jax": "1.2"}}, file)
with open(f"{folder}/metrics.jsonl", "w") as file:
    file.write(json.dumps({"step": 7, "val/bits_per_char": seq_len / 4}) + "\n")
