# Training and inference on NVIDIA GPUs. NOT YET BUILT OR RUN: make the first run a small one.
#
#   docker build -t flextok .        # for drivers before 580 with --build-arg CUDA=cuda12
#   docker run --rm --gpus all --shm-size=8g -v "$PWD/runs:/runs" -v /data:/data:ro flextok \
#       python -m flextok_jax.main --config=configs/tokenizer.py:digits --workdir=/runs/digits
#   docker run --rm --gpus all -v "$PWD:/here" flextok \
#       flextok reconstruct --model demo-digits --images /here/photos --out /here/reconstructions
#
# CUDA comes with the wheels of jax; the machine needs NVIDIA's driver and its container toolkit.
FROM python:3.12-slim
ARG CUDA=cuda13
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility PYTHONUNBUFFERED=1
WORKDIR /flextok
COPY setup.py README.md LICENSE NOTICE ./
COPY flextok_jax flextok_jax
COPY configs configs
COPY examples examples
RUN pip install --no-cache-dir ".[train,gs,s3,${CUDA}]"
CMD ["flextok", "--help"]
