"""The floor to compare with: ``transformers`` alone, on the same requests."""

from __future__ import annotations

from collections.abc import Sequence

from equipoise.config import Sampling
from equipoise.models.load import LoadedPolicy


def bare_generate(
    loaded: LoadedPolicy, prompts: Sequence[tuple[int, ...]], sampling: Sampling, *, batch_size: int
) -> list[int]:
    """Sample with ``transformers`` alone, in left-padded batches; returns tokens per completion.

    A batch ends with its longest row, and rows that are done go on as padding: so it counts the
    tokens up to the end token only, as the others do.
    """
    import torch

    encoder, lengths = loaded.encoder, list[int]()
    ends = torch.tensor(sorted(encoder.eos_ids))
    for at in range(0, len(prompts), batch_size):
        batch = prompts[at : at + batch_size]
        width = max(map(len, batch))
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        with torch.inference_mode():
            whole = loaded.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True,
                temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
                max_new_tokens=sampling.max_tokens, suppress_tokens=list(encoder.masked_ids),
                eos_token_id=ends.tolist(), pad_token_id=int(ends[0]),
            )  # fmt: skip
        ended = torch.isin(whole[:, width:], ends)
        first = torch.where(ended.any(1), ended.int().argmax(1) + 1, ended.shape[1])
        lengths += first.tolist()
    return lengths
