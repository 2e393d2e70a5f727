"""How well a trained model predicts and writes."""

from charlstm.evaluation.comparison import compare_losses as compare_losses
from charlstm.evaluation.comparison import compare_runs as compare_runs
from charlstm.evaluation.comparison import welch_test as welch_test
from charlstm.evaluation.features import text_features as text_features
from charlstm.evaluation.inside import record_states as record_states
from charlstm.evaluation.measure import Evaluation as Evaluation
from charlstm.evaluation.measure import HeldOut as HeldOut
from charlstm.evaluation.measure import evaluate as evaluate
from charlstm.evaluation.measure import open_held_out as open_held_out
from charlstm.evaluation.probes import ProbeScore as ProbeScore
from charlstm.evaluation.probes import UnitScores as UnitScores
from charlstm.evaluation.probes import linear_probe as linear_probe
from charlstm.evaluation.probes import probe_units as probe_units
from charlstm.evaluation.surprise import Predictions as Predictions
from charlstm.evaluation.surprise import predict_text as predict_text
