# docker build -t edm . && docker run --rm --gpus all --ipc=host -v "$PWD":/workspace edm edm-train --help
# PyPI's PyTorch for Linux brings CUDA's libraries; torch.compile needs the C compiler.
FROM python:3.12-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/edm
COPY . .
RUN pip install --no-cache-dir -c constraints.txt '.[tensorboard]'

# What a run reads and writes.
WORKDIR /workspace
CMD ["edm-train", "--help"]
