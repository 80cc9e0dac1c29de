"""DeepSparse in a process of its own: `PYTHON deepsparse_engine.py MODEL.onnx INPUTS.npz CORES`.

Needs an environment with deepsparse 1.8.0, numpy 1.26.4 and onnx 1.14.1, which cannot share ours. Prints "ready", then
for every line "SECONDS" on standard input runs for about that long and prints the milliseconds of one call.
"""

import sys
import time

import deepsparse
import numpy as np


def main(model: str, inputs: str, cores: int) -> None:
    with np.load(inputs) as arrays:
        feeds = [np.ascontiguousarray(arrays[name]) for name in arrays.files]
    engine = deepsparse.Engine(model, batch_size=feeds[0].shape[0], num_cores=cores)
    for _ in range(3):
        engine.run(feeds)
    print("ready", flush=True)
    for line in sys.stdin:
        for _ in range(2):  # the first part is not counted: threads of the contender before may still spin
            calls, begin = 0, time.perf_counter()
            while calls < 2 or time.perf_counter() - begin < float(line):
                engine.run(feeds)
                calls += 1
            took = time.perf_counter() - begin
        print(1e3 * took / calls, flush=True)


main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
