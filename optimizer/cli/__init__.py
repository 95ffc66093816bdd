"""The commands of llmopt, one file each, loaded when called."""
