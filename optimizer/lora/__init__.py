"""Adapters: PEFT's LoRA checkpoints, read and fitted to a model."""
