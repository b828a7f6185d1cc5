"""What configs mean: each model family as data, read into a `DecoderConfig`."""
