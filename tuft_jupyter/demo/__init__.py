"""The bundled base model `tuft/demo`: this directory is a Hugging Face model directory, made by `scripts/demo_model`."""
