"""How alike two sentences are: the cosine of their embeddings by a sentence model of transformers.

The embedding is the mean of the last layer over the tokens, scaled to length 1, as sentence-transformers has it for
the MiniLM and MPNet models (Reimers and Gurevych, arXiv:1908.10084). Nothing is loaded before the first comparison.

Letters: N sentences, T tokens, D features.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from rewards.detectors.weights import device_of, folder_of

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


class SentenceEncoder:
    """One sentence model, loaded."""

    def __init__(self, path: str = MINILM, download: bool = False, device: str = "cpu", where: str = "encoder") -> None:
        """Load it.

        Args:
            path: a local folder in the released layout, or a hub id.
            download: fetch a hub id that the cache lacks.

        Raises:
            WeightsError: neither is there.
        """
        from transformers import AutoModel, AutoTokenizer

        folder = folder_of(path, "config.json", download, where)
        self.device = device_of(device, where)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model: Any = AutoModel.from_pretrained(folder, local_files_only=True).to(self.device).eval()
        limits = [self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", 512)]
        stated = folder / "sentence_bert_config.json"
        if stated.is_file():
            limits.append(json.loads(stated.read_text())["max_seq_length"])
        self.max_length = int(min(limits))

    def embed(self, sentences: Sequence[str], batch_size: int = 32) -> np.ndarray:
        """Unit vectors, float32 [N, D]."""
        import torch

        rows = [np.empty((0, self.model.config.hidden_size), np.float32)]
        for start in range(0, len(sentences), batch_size):
            tokens = self.tokenizer(
                list(sentences[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.device)
            with torch.no_grad():
                states_NTD = self.model(**tokens).last_hidden_state.float()
            mask_NT1 = tokens["attention_mask"].unsqueeze(-1)  # padding would pull short sentences together
            mean_ND = (states_NTD * mask_NT1).sum(1) / mask_NT1.sum(1).clamp(min=1)
            rows.append(torch.nn.functional.normalize(mean_ND, dim=-1).cpu().numpy())
        return np.concatenate(rows)

    def similarities(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The cosine of each pair, in [-1, 1]."""
        if not pairs:
            return []
        both = self.embed([sentence for pair in pairs for sentence in pair])
        return [float(np.dot(both[i], both[i + 1])) for i in range(0, len(both), 2)]


@functools.lru_cache(maxsize=4)
def sentence_encoder(path: str, download: bool = False, device: str = "cpu", where: str = "encoder") -> SentenceEncoder:
    """One load a process and model."""
    return SentenceEncoder(path, download, device, where)
