"""Networks of lcsc's own in the files that diffusers writes, without importing it, which takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file
from torch import nn

#: Name of the files of weights, as diffusers gives it; `suffix` numbers shards.
WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"


class OwnFiles:
    """Saving and loading for a network whose constructor takes `settings`; a base before `nn.Module`.

    `written` is the pattern of the files' names, `read` which files of a folder are read.
    """

    written: ClassVar[str] = WEIGHTS
    read: ClassVar[str] = WEIGHTS.format(suffix="*")

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values that make the network again."""
        raise NotImplementedError

    def save_pretrained(self, folder: str, *, max_shard_size: str = "5GB", **_: Any) -> None:
        """Write config.json and safetensors shards into `folder`, as a network of diffusers does."""
        from huggingface_hub import save_torch_state_dict

        assert isinstance(self, nn.Module)
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = {"_class_name": type(self).__name__, **self.settings}
        (Path(folder) / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_torch_state_dict(self.state_dict(), folder, filename_pattern=self.written, max_shard_size=max_shard_size)

    @classmethod
    def from_pretrained(cls, folder: str, *, output_loading_info: bool = False, **_: Any) -> Any:
        """The network in `folder`, in eval mode; in a pair with the missing and unexpected keys where these are wanted.

        Raises:
            OSError: no files of weights.
            Exception: what safetensors and torch raise for damaged ones, and for tensors of other shapes.
        """
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        net: Any = cls(**{key: value for key, value in config.items() if not key.startswith("_")})
        files = sorted(Path(folder).glob(cls.read))
        if not files:
            raise OSError(f"no {cls.read}")
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        missing, unexpected = net.load_state_dict(tensors, strict=False)
        info = {"missing_keys": missing, "unexpected_keys": unexpected}
        return (net.eval(), info) if output_loading_info else net.eval()
