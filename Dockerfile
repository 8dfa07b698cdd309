# JupyterLab with tuft-jupyter, on the image of Jupyter's docker-stacks.
#
#   docker build -t tuft-jupyter .
#   docker run --rm -p 127.0.0.1:8888:8888 --shm-size 4g -v tuft:/home/jovyan/.tuft tuft-jupyter
#
# For a GPU: --build-arg CUDA=1 at the build, --gpus all at the start. The steps of the build are a Binder's, which
# `make binder` runs in a clean environment where there is no Docker.
ARG BASE=quay.io/jupyter/minimal-notebook:python-3.12
FROM $BASE

ARG CUDA=
COPY --chown=${NB_UID}:${NB_GID} . /tmp/tuft-jupyter
WORKDIR /tmp/tuft-jupyter
RUN pip install --no-cache-dir --requirement binder/requirements.txt \
 && CUDA=$CUDA bash binder/postBuild \
 && cp -r examples "$HOME/examples" \
 && rm -rf /tmp/tuft-jupyter/* "$HOME/.npm"
WORKDIR /home/jovyan

# Keys, journal and checkpoints: mount something that lasts here.
ENV TUFT_HOME=/home/jovyan/.tuft
RUN mkdir -m 700 "$TUFT_HOME"
