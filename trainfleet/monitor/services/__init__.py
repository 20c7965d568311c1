"""A run in services outside: Weights & Biases, MLflow, Prometheus. None of them can slow or stop it."""

from trainfleet.monitor.services.mlflow import Mlflow, MlflowConfig
from trainfleet.monitor.services.prometheus import Prometheus, PrometheusConfig
from trainfleet.monitor.services.wandb import WandB, WandbConfig

__all__ = ["Mlflow", "MlflowConfig", "Prometheus", "PrometheusConfig", "WandB", "WandbConfig"]
