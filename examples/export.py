"""Train with ZeRO-3 on two processes, then load the weights into the plain module, without trainfleet."""

import shutil
import subprocess

import torch
from digits import Digits, mlp
from safetensors.torch import load_file

from trainfleet import launch, train

RUN = "runs/to_export"


def train_sharded() -> None:
    train(mlp, Digits(), {"zero_stage": 3, "batch_size": 32, "learning_rate": 3e-3, "steps": 100, "save_dir": RUN})


if __name__ == "__main__":
    shutil.rmtree(RUN, ignore_errors=True)
    launch(train_sharded, nproc=2)
    subprocess.run(["trainfleet", "checkpoint", "export", RUN, "digits.safetensors", "--force"], check=True)

    model = mlp()
    model.load_state_dict(load_file("digits.safetensors"))
    digits = Digits(held_out=True)
    right = model(digits.images).argmax(1) == torch.as_tensor(digits.labels)
    print(f"{right.float().mean():.0%} of the held-out digits are read rightly")
