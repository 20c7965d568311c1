"""The side that has the data: what does the model that stands where `serve_gpu.py` runs say of each image?

Interrupted, the same command goes on.
"""

import sys

from digits import Digits

from trainfleet import LocalBatches, predict

if __name__ == "__main__":
    images = LocalBatches(Digits(held_out=True), size=32, workers=2, shuffle=False, short="keep")
    with images:
        written = predict(sys.argv[1:], images, top_k=2, confidence=0.5, to="runs/predictions")
    print(written)
    sure = written.load()
    for index, classes, confidences in zip(sure.indices[:5], sure.classes, sure.confidences):
        print(f"image {index}: {classes[0]} ({confidences[0]:.0%}), or {classes[1]} ({confidences[1]:.0%})")
