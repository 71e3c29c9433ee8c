"""Alternatives to Triton that a classifier is compared with on the same texts; each returns texts per second."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from patcher.classifier import Classifier

BATCH = 32
CLIENTS = 16
SERVER = """
import sys
import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from patcher.repository import ModelRepository
from patcher.runtime import Encoder, open_session, run_head

classifier = ModelRepository(sys.argv[1]).classifier(sys.argv[2])
encoder = Encoder(classifier.backbone_path, classifier.tokenizer_path)
head = open_session(classifier.version_path(classifier.serving()) / "model.onnx", threads=1)
app = FastAPI()

class Question(BaseModel):
    text: str

@app.post("/classify")
def classify(question: Question):
    answer = run_head(head, encoder.encode([question.text]))
    return {"label": answer.labels[0].tolist(), "score": answer.scores[0].tolist(), "version": answer.version}

uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[3]), log_level="error")
"""


def _rate(run: Callable[[Sequence[str]], object], texts: Sequence[str]) -> float:
    run(texts[:BATCH])
    start = time.perf_counter()
    run(texts)
    return len(texts) / (time.perf_counter() - start)


def onnxruntime_sorted(classifier: Classifier) -> Callable[[Sequence[str]], float]:
    """The repository's own files in this process, texts sorted by length, in batches of 32: the practical limit."""
    from patcher.runtime import Encoder, open_session, run_head

    encoder = Encoder(classifier.backbone_path, classifier.tokenizer_path)
    head = open_session(classifier.version_path(classifier.serving()) / "model.onnx")
    return lambda texts: _rate(lambda some: run_head(head, encoder.encode(some)), texts)


def transformers_one_by_one(checkpoint: Path) -> Callable[[Sequence[str]], float]:
    """The transformers pipeline that most people start with."""
    from transformers import pipeline

    classify = pipeline("text-classification", model=str(checkpoint), device="cpu", top_k=5)
    return lambda texts: _rate(lambda some: [classify(text) for text in some], texts)


def pytorch_batched(checkpoint: Path) -> Callable[[Sequence[str]], float]:
    """The checkpoint in PyTorch, texts sorted by length, in batches of 32."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    def run(texts: Sequence[str]) -> None:
        ordered = sorted(texts, key=len)
        with torch.inference_mode():
            for start in range(0, len(ordered), BATCH):
                model(**tokenizer(ordered[start : start + BATCH], padding=True, truncation=True, return_tensors="pt"))

    return lambda texts: _rate(run, texts)


class FastApi:
    """A typical FastAPI + onnxruntime server in a process of its own, with one text per request.

    ``available`` is True if fastapi and uvicorn are installed (`pip install fastapi uvicorn`).
    """

    available = all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn"))

    def __init__(self, classifier: Classifier, port: int) -> None:
        self.port = port
        self.own = threading.local()  # each client keeps its connection open, as perf_analyzer's clients do
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-c", SERVER, str(classifier.root.resolve()), classifier.name, str(port)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
        self.process = subprocess.Popen(command, env=environment)
        deadline = time.monotonic() + 60
        while True:
            try:
                self.ask("hello")
                break
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.close()
                    raise
                time.sleep(0.1)

    def ask(self, text: str) -> bytes:
        """Classify one text; return the response's body."""
        if not hasattr(self.own, "connection"):
            self.own.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        body = json.dumps({"text": text})
        try:
            self.own.connection.request("POST", "/classify", body, {"Content-Type": "application/json"})
            response = self.own.connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as error:
            self.own.connection.close()
            raise OSError(f"no answer from the FastAPI server: {error}") from error
        if response.status != 200:
            raise OSError(f"the FastAPI server answered {response.status}: {answer[:200]!r}")
        return answer

    def rate(self, texts: Sequence[str]) -> float:
        """Texts per second with 16 concurrent clients."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            return _rate(lambda some: list(pool.map(self.ask, some)), texts)

    def close(self) -> None:
        """Stop the server."""
        self.process.terminate()
        self.process.wait(timeout=30)
