"""The side that has the data: how right is the model that stands where `serve_gpu.py` runs?"""

import sys

from digits import Digits

from trainfleet import LocalBatches, validate

if __name__ == "__main__":
    held_out = LocalBatches(Digits(held_out=True), size=32, workers=2, shuffle=False, short="keep")
    with held_out:
        found = validate(sys.argv[1:], held_out)
    print(found)
    print(f"{found.picture('runs/confusion.png')} shows what is taken for what")
