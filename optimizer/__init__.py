"""The compiler's core: recipe, model, pipeline, cache and manifest."""
