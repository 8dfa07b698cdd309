"""The bundled base model `tuft/demo`: a Hugging Face model directory, made by `scripts/demo_model`."""
