"""An encoder-decoder of transformers whose decoder has tensors of the encoder.

transformers 5 takes `tie_encoder_decoder=True` and shares nothing. Here the configuration says what is shared
(`share`), the class ties it by the library's own means, and so files hold each tensor once.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, EncoderDecoderConfig, EncoderDecoderModel

from lcsc.core.errors import ConfigError
from lcsc.recycling.composite import SHARED
from lcsc.recycling.families import FAMILIES
from lcsc.recycling.warm_start import SHARES


class SharedEncoderDecoderConfig(EncoderDecoderConfig):
    """That of an `EncoderDecoderModel`, and `share`: `embeddings` or `all`.

    Its `model_type` is lcsc's, so that transformers alone refuses such a folder in place of drawing what is shared.
    """

    model_type = SHARED[1]
    share: str = "all"


class SharedEncoderDecoderModel(EncoderDecoderModel):
    """An `EncoderDecoderModel` whose decoder has the encoder's embedding matrix, or all of its tensors.

    Raises:
        ConfigError: `share` is neither `embeddings` nor `all`.
    """

    config_class = SharedEncoderDecoderConfig

    def __init__(self, config: Any, encoder: Any = None, decoder: Any = None) -> None:
        if config.share not in SHARES[1:]:
            raise ConfigError(f"`share` is `{config.share}`; it must be one of {', '.join(SHARES[1:])}.")
        encoder = encoder or AutoModel.from_config(config.encoder, add_pooling_layer=False)  # a decoder reads no pooler
        super().__init__(config, encoder, decoder)
        self.config.tie_word_embeddings = True
        family = FAMILIES[config.decoder.model_type]
        base = dict(getattr(self.decoder, family.prefix).named_parameters())
        names = {name: name for name, _ in self.encoder.named_parameters() if name in base}
        if config.share == "embeddings":
            names = {family.words: FAMILIES[config.encoder.model_type].words}
        self._tied_weights_keys = {f"decoder.{family.prefix}.{own}": f"encoder.{twin}" for own, twin in names.items()}
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        self.tie_weights()


AutoConfig.register(SHARED[1], SharedEncoderDecoderConfig)
AutoModelForSeq2SeqLM.register(SharedEncoderDecoderConfig, SharedEncoderDecoderModel)
