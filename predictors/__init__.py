"""Container resource prediction: run time, GPU memory and chance of failure of a task, learned online."""

from predictors.forecaster import DeclaredForecaster, NoisyForecaster, OnlineForecaster, OracleForecaster
from predictors.predictor import LEVELS, Outcome, Prediction, Predictor

__all__ = [
    "LEVELS",
    "DeclaredForecaster",
    "NoisyForecaster",
    "OnlineForecaster",
    "OracleForecaster",
    "Outcome",
    "Prediction",
    "Predictor",
]
