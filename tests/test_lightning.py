"""WatchCallback in Lightning's trainer."""

import pytest

torch = pytest.importorskip("torch")

import vision  # noqa: E402, F401  # lightning imports torchvision

lightning = pytest.importorskip("lightning")
pytest.importorskip("pyarrow")

from torch import nn  # noqa: E402

from batchnorm.diagnose import Recording  # noqa: E402
from batchnorm.torch.lightning import WatchCallback  # noqa: E402


class Module(lightning.LightningModule):
    def __init__(self, fails=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.fails = fails

    def training_step(self, batch, number):
        if self.fails and number == 5:
            raise RuntimeError("no more")
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def _fit(module, callback):
    data = torch.utils.data.TensorDataset(torch.randn(256, 4))
    trainer = lightning.Trainer(
        max_epochs=2, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, 16))


@pytest.mark.filterwarnings("ignore")
def test_training_batches_are_steps(tmp_path):
    module = Module()
    callback = WatchCallback(
        tmp_path / "run.parquet", every=4, probe=torch.randn(32, 4), forward=lambda m, b: m.net(b)
    )
    _fit(module, callback)
    loaded = Recording.load(tmp_path / "run.parquet")
    assert loaded.steps == callback.recording.steps == list(range(0, 32, 4))
    assert loaded.layers == ["net.1"]
    assert all(s.gradient > 0 for s in loaded.snapshots)
    assert loaded.snapshots[1].moved > 0
    assert not any(m._forward_hooks for m in module.modules())


@pytest.mark.filterwarnings("ignore")
def test_exception_keeps_what_there_is(tmp_path):
    module = Module(fails=True)
    callback = WatchCallback(tmp_path / "run.parquet", every=2)
    with pytest.raises(RuntimeError, match="no more"):
        _fit(module, callback)
    assert Recording.load(tmp_path / "run.parquet").steps == [0, 2, 4]
    assert not any(m._forward_hooks for m in module.modules())
