"""Language models: loading, quantisation, adapters, log-probabilities."""
