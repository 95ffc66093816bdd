"""What ``benchmarks/lora_demo.py`` is made of: a text, an adapter trained on it, builds with it, and PEFT as judge."""
