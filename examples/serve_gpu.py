"""The side that has the GPU: a trained model stands here, and answers for the batches of others, until Ctrl-C.

`validate_cpu.py` and `predict_cpu.py` are the other side.
"""

import sys

from digits import Digits, digit_loss, mlp

from trainfleet import ModelService, train
from trainfleet.serve import Predictor

model = mlp()
train(model, Digits(), {"batch_size": 32, "learning_rate": 1e-3, "steps": 200}, loss_fn=digit_loss)
print("The model is trained.", flush=True)
ModelService(Predictor(model, loss_fn=digit_loss), address=sys.argv[1]).serve()
