"""The rooms of `examples/pretrain_hf.py`: presets, places, documents, data, plan, train; files for FSDP2 and ZeRO."""
