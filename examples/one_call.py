"""One call: a model, a dataset and a dictionary, with the names that you know or the keys of a recipe."""

from digits import Digits, mlp

from trainfleet import train

config = {"batch_size": 32, "learning_rate": 1e-3, "zero_stage": 1, "gradient_clipping": 1.0, "steps": 200}
outcome = train(mlp(), Digits(), {**config, "save_dir": "runs/digits"}, evaluation=Digits(held_out=True))
print(f"{outcome.reason} after {outcome.step} steps, held-out loss {outcome.evaluation}")
