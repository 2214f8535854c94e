"""How good a student is: its head, a linear probe, its neighbours, its likeness to the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_lora.distill.data.batches import Batch
from fused_lora.distill.data.views import seeded
from fused_lora.distill.recipe.tables import Evaluate
from fused_lora.distill.stack import pairs_of, spans_of, tokens_of
from fused_lora.distill.wecolora import token_loss

Pass = Callable[[], Iterator[Batch]]  # a fresh pass over a split, in order


def features_of(model: nn.Module, batches: Iterator[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """(features [n, d], logits [n, classes], labels [n]) of a model in eval mode."""
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    with torch.no_grad():
        for batch in batches:
            tokens = model.forward_features(batch.images)  # type: ignore[operator]
            pooled = model.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
            logits = model.forward_head(tokens)  # type: ignore[operator]
            kept.append((pooled.cpu(), logits.cpu(), batch.labels.cpu()))
    features, logits, labels = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return features, logits, labels


def measure(model: nn.Module, train: Pass, test: Pass, about: Evaluate) -> dict[str, float]:
    """The accuracies that the recipe asks for, in [0, 1]."""
    found: dict[str, float] = {}
    features, logits, labels = features_of(model, test())
    if about.head:
        found["head"] = (logits.argmax(1) == labels).double().mean().item()
    if about.probe == "none" and not about.knn:
        return found
    seen, _, known = features_of(model, train())
    if about.probe != "none":
        found["probe"] = PROBES[about.probe](seen, known, features, labels)
    if about.knn:
        found["knn"] = neighbours(seen, known, features, labels, about.knn)
    return found


def logistic(seen: Tensor, known: Tensor, features: Tensor, labels: Tensor) -> float:
    """Accuracy of a logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(seen.double().numpy(), known.numpy())
    return float(probe.score(features.double().numpy(), labels.numpy()))


def sgd(
    seen: Tensor,
    known: Tensor,
    features: Tensor,
    labels: Tensor,
    epochs: int = 90,
    batch: int = 4096,
) -> float:
    """Accuracy of one linear layer trained by SGD: for sets too large for ``logistic``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mean, std = seen.float().mean(0), seen.float().std(0) + 1e-6
    seen, features = ((each.float() - mean) / std for each in (seen, features))
    classes = int(torch.cat([known, labels]).max()) + 1
    with seeded(0):
        probe = nn.Linear(seen.shape[1], classes).to(device)
        optimizer = torch.optim.SGD(probe.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for rows in torch.randperm(len(seen)).split(batch):
                loss = F.cross_entropy(probe(seen[rows].to(device)), known[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
    with torch.no_grad():
        predicted = torch.cat(
            [probe(part.to(device)).argmax(1).cpu() for part in features.split(batch)]
        )
    return (predicted == labels).double().mean().item()


PROBES = {"logistic": logistic, "sgd": sgd}


def neighbours(seen: Tensor, known: Tensor, features: Tensor, labels: Tensor, count: int) -> float:
    """Accuracy of the ``count`` nearest training images by cosine, weighted by closeness."""
    from sklearn.neighbors import KNeighborsClassifier

    count = min(count, len(seen))
    judge = KNeighborsClassifier(count, metric="cosine", algorithm="brute", weights="distance")
    judge.fit(seen.double().numpy(), known.numpy())
    return float(judge.score(features.double().numpy(), labels.numpy()))


def token_distance(
    student: nn.Module, teacher: nn.Module, batches: Iterator[Batch], reduction: int
) -> float:
    """mean |T - S| of the last blocks' tokens, the loss on images that were not trained on."""
    (pair,) = pairs_of(teacher, reduction)
    total, images = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            _, (wanted,) = tokens_of(teacher, batch.images, [pair.teacher])
            _, (tokens,) = tokens_of(student, batch.images, [pair.student])
            total += token_loss(tokens, wanted).item() * len(batch.labels)
            images += len(batch.labels)
    return total / images


def likeness(
    student: nn.Module, teacher: nn.Module, batches: Iterator[Batch], reduction: int
) -> dict[str, dict[str, float]]:
    """Mean cosine between the tokens of each student's block and those it stands for.

    The first of a row is the teacher's kept block itself, the others are those skipped.
    """
    spans = spans_of(teacher, reduction)
    theirs = [name for names in spans.values() for name in names]
    sums, tokens = {name: 0.0 for name in theirs}, 0
    convolutional = {
        name
        for name in theirs
        if any(isinstance(part, nn.Conv2d) for part in teacher.get_submodule(name).modules())
    }
    with torch.no_grad():
        for batch in batches:
            wanted = dict(zip(theirs, tokens_of(teacher, batch.images, theirs)[1], strict=True))
            mine = tokens_of(student, batch.images, list(spans))[1]
            for own, names in zip(mine, spans.values(), strict=True):
                for name in names:
                    maps = own.dim() == 4 and name in convolutional  # [b, d, height, width]
                    axis = 1 if maps else -1
                    near = F.cosine_similarity(own.double(), wanted[name].double(), dim=axis)
                    sums[name] += near.mean().item() * len(batch.labels)
            tokens += len(batch.labels)
    return {block: {n: sums[n] / tokens for n in names} for block, names in spans.items()}
