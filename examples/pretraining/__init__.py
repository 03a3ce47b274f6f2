"""The rooms of `examples/pretrain.py`: model, norms, data, train, plot."""
