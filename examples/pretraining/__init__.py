"""The rooms of `examples/pretrain.py`: model, norms, data, train, files, distributed, sample, export, plot."""
