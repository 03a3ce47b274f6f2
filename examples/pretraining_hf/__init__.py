"""The rooms of `examples/pretrain_hf.py`: presets, data, plan, train; and the configurations for FSDP2 and ZeRO."""
