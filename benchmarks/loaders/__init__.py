"""Programs that load what llmopt writes; each script writes the logits that its program computes."""
