"""Everything that makes the bundled base model `tuft/demo`: its world, its corpus, its training."""
