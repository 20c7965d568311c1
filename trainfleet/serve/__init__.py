"""What a trained model says about batches, here or on other hosts: validation and predictions."""

from __future__ import annotations

from trainfleet.serve.predictions import Predictions, predict
from trainfleet.serve.predictor import Predictor
from trainfleet.serve.remote import RemoteModel
from trainfleet.serve.service import ModelService
from trainfleet.serve.terms import Answering, Terms
from trainfleet.serve.validation import Validation, validate
from trainfleet.serve.written import WrittenPredictions, load_predictions

__all__ = [
    "Answering",
    "ModelService",
    "Predictions",
    "Predictor",
    "RemoteModel",
    "Terms",
    "Validation",
    "WrittenPredictions",
    "load_predictions",
    "predict",
    "validate",
]
