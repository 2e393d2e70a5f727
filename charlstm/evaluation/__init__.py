"""How well a trained model predicts and writes."""
