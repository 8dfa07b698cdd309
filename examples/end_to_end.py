"""The end-to-end example of TuFT's README, unchanged but for the address and the key, which come from the
environment.

    TINKER_BASE_URL=http://localhost:8888/tuft TINKER_API_KEY=tml-... python examples/end_to_end.py

In a notebook of a server with tuft-jupyter both variables are already set. The token ids are made up, as in
the original; ``tokenizer.ipynb`` makes the same calls with text.
"""

import os

import tinker
from tinker import types

# Connect to the running tuft server via the bundled SDK
client = tinker.ServiceClient(base_url=os.environ["TINKER_BASE_URL"], api_key=os.environ["TINKER_API_KEY"])

# Discover available base models before launching a training run
capabilities = client.get_server_capabilities()
base_model = capabilities.supported_models[0].model_name

print("Supported models:")
for model in capabilities.supported_models:
    print("-", model.model_name or "(unknown)")

# Start a LoRA training client targeting the first supported model
training = client.create_lora_training_client(base_model=base_model, rank=8)

# tokenizer = training.get_tokenizer()
# prompt_tokens = tokenizer.encode("Hello from TuFT")
# target_tokens = tokenizer.encode(" Generalizing beyond the prompt")
prompt_tokens = [101, 42, 37, 102]
target_tokens = [101, 99, 73, 102]

datum = types.Datum(
    model_input=types.ModelInput.from_ints(prompt_tokens),
    loss_fn_inputs={
        "target_tokens": types.TensorData(data=target_tokens, dtype="int64", shape=[len(target_tokens)])
    },
)

# Run a single forward/backward pass and observe the reported metrics
fwdbwd = training.forward_backward([datum], "cross_entropy").result(timeout=30)
print("Loss metrics:", fwdbwd.metrics)

# Apply an optimizer update to mutate the toy weights
optim = training.optim_step(types.AdamParams(learning_rate=1e-4)).result(timeout=30)
print("Optimizer metrics:", optim.metrics)

# Persist both checkpoint and sampler artifacts for later reuse
checkpoint = training.save_state("demo-checkpoint").result(timeout=60)
sampler_weights = training.save_weights_for_sampler("demo-sampler").result(timeout=60)

# Inspect the server session via the REST client for debugging
rest = client.create_rest_client()
session_id = client.holder.get_session_id()
session_info = rest.get_session(session_id).result(timeout=30)
print("Session contains training runs:", session_info.training_run_ids)

# Spin up a sampler tied to the saved weights and generate tokens
sampling = client.create_sampling_client(model_path=sampler_weights.path)
# sample_prompt = tokenizer.encode("Tell me something inspiring.")
sample_prompt = [101, 57, 12, 7, 102]
sample = sampling.sample(
    prompt=types.ModelInput.from_ints(sample_prompt),
    num_samples=1,
    sampling_params=types.SamplingParams(max_tokens=5, temperature=0.5),
).result(timeout=30)

if sample.sequences:
    print("Sample tokens:", sample.sequences[0].tokens)

print("Checkpoint saved to:", checkpoint.path)
print("Sampler weights saved to:", sampler_weights.path)
