"""How well a trained model predicts and writes."""

from charlstm.evaluation.measure import Evaluation as Evaluation
from charlstm.evaluation.measure import HeldOut as HeldOut
from charlstm.evaluation.measure import evaluate as evaluate
from charlstm.evaluation.measure import open_held_out as open_held_out
from charlstm.evaluation.surprise import Predictions as Predictions
from charlstm.evaluation.surprise import predict_text as predict_text
