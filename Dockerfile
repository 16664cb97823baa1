# A server for one exported student, without torch. Export it first, then build in the folder of the repository:
#   distillery export runs/tiny-kd-0
#   docker build --build-arg STUDENT=tiny-kd-0 --tag student . && docker run --publish 8000:8000 student
FROM python:3.12-slim
ARG STUDENT=tiny-kd-0
WORKDIR /app
COPY requirements.lock ./
# What the server imports, at the versions and with the hashes of the lock.
RUN for name in annotated-types numpy onnxruntime pydantic pydantic-core ruamel-yaml scipy tokenizers \
      typing-extensions typing-inspection; do \
      awk -v name="$name" '/^[a-z]/ { keep = index($0, name "==") == 1 } keep' requirements.lock; \
    done > pins.txt \
    && pip install --no-cache-dir --no-deps --require-hashes -r pins.txt
COPY src src
COPY runs/${STUDENT}/model model
ENV PYTHONPATH=/app/src PYTHONUNBUFFERED=1
USER nobody
EXPOSE 8000
HEALTHCHECK CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["python", "-m", "distillery", "serve", "model", "--host", "0.0.0.0"]
