"""The side that has the data and the CPUs: it makes batches for `feed_gpu.py`, until Ctrl-C."""

import sys

from digits import Digits

from trainfleet import DataService, LocalBatches

if __name__ == "__main__":
    training = LocalBatches(Digits(), size=32, workers=2)
    held_out = LocalBatches(Digits(held_out=True), size=32, shuffle=False, short="keep")
    DataService(training, evaluation=held_out, address=sys.argv[1]).serve()
