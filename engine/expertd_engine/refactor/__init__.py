"""Read-ME: a dense language model becomes experts behind a pre-gating router. Conversion, training and export."""
