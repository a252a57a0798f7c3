"""The forward pass that replaces a model's own while its tokens are reduced."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast

from ficoco_vllm.hf.batch import Batch, padded, questions_about, spread
from ficoco_vllm.hf.cache import CacheState
from ficoco_vllm.hf.counts import Reduction
from ficoco_vllm.hf.decoder import Output, SegmentedModel
from ficoco_vllm.hf.images import ImageEncoder, ImageTokens, PostponedImage
from ficoco_vllm.planning.decoder import RequestPlan

FEATURE_CHOICES = ("vision_feature_layer", "vision_feature_select_strategy")
REPLACED = ("forward", "get_image_features")
# Arguments of a forward that `ReducedModel` passes on in another form.
NOT_OF_LAYERS = frozenset(
    {
        *("attention_mask", "past_key_values", "position_ids", "use_cache", "inputs_embeds", "return_dict"),
        *("output_attentions", "output_hidden_states", "image_sizes", *FEATURE_CHOICES),
    }
)


class ReducedModel:
    """`forward` and `get_image_features` of a model whose tokens are reduced. It owns no weights."""

    def __init__(self, model: Any, reduction: Reduction) -> None:
        """Keep the model's own methods.

        Args:
            model: transformers' `LlavaModel` or `LlavaNextModel`.
            reduction: the reduction to apply; its counts are updated.
        """
        self.model, self.reduction = model, reduction
        self.stock_forward, self.stock_features = model.forward, model.get_image_features
        plan = reduction.plan
        self.encoder = ImageEncoder(model, plan.tower, self.stock_features)
        self.decoder = None
        self.layers: tuple[int, ...] = (0,)
        if plan.decoder is not None:
            self.decoder = SegmentedModel(model.language_model, plan.decoder, plan.tower.shape.grid)
            segments = plan.decoder.segments
            self.layers = tuple(segments.size * segment for segment in range(segments.num_segments))

    def install(self) -> None:
        """Replace the model's own methods."""
        self.replaced = {name: vars(self.model).get(name) for name in REPLACED}
        for name in REPLACED:
            setattr(self.model, name, getattr(self, name))

    def uninstall(self) -> None:
        """Restore the model's own methods.

        Raises:
            RuntimeError: they have been replaced again.
        """
        for name in REPLACED:
            if getattr(vars(self.model).get(name), "__self__", None) is not self:
                raise RuntimeError(f"{name} of the model has been replaced since; undo that first")
        for name, before in self.replaced.items():
            delattr(self.model, name)
            if before is not None:
                setattr(self.model, name, before)

    def get_image_features(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode images; `generate` calls this once before it repeats prompts for beams.

        Args:
            pixel_values: as the processor returns them.
            image_sizes: (n, 2) height and width of each image, for LLaVA-NeXT.
            **kwargs: arguments of the model's own method; which features are read is fixed by the configuration.

        Returns:
            `pooler_output` has an `ImageTokens` for each image, a `PostponedImage` where the method reads the question.
        """
        self._check_mode()
        for name in FEATURE_CHOICES:
            configured = getattr(self.model.config, name)
            if kwargs.get(name) not in (None, configured):
                raise ValueError(
                    f"{name} = {kwargs[name]!r} is not allowed while tokens are reduced; allowed: {configured!r}"
                )
        encode = self.encoder.postpone if self.encoder.reads_question else self.encoder
        encoded: Any = encode(pixel_values, image_sizes)
        return BaseModelOutputWithPooling(pooler_output=encoded)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        attention_mask: Any = None,
        past_key_values: Any = None,
        mm_encoder_outputs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model on fewer tokens than `input_ids` has.

        Args:
            input_ids: (B, S) int64, with the placeholders of unreduced images.
            pixel_values: as the processor returns them, or None.
            attention_mask: (B, tokens in the cache + S), zero for padding; or None.
            past_key_values: cache, or None.
            mm_encoder_outputs: output of `get_image_features`, under "image", or None.
            **kwargs: arguments of the model's own forward. `position_ids` are recomputed without the removed tokens.

        Returns:
            As the model's own. `last_hidden_state` is (B, S, D): where a token has left, it repeats the last one
            before it that is left.

        Raises:
            ValueError: an argument does not fit a reduction.
        """
        if pixel_values is not None and len(pixel_values):
            choices = {name: kwargs.pop(name, None) for name in ("image_sizes", *FEATURE_CHOICES)}
            mm_encoder_outputs = {"image": self.get_image_features(pixel_values, **choices)}
        encoded = (mm_encoder_outputs or {}).get("image")
        images: list[Any] = [] if encoded is None else list(encoded.pooler_output)
        state = CacheState.of(past_key_values)
        given = {"attention_mask": attention_mask, "past_key_values": past_key_values, **kwargs}
        if not images and state is None:
            return self.stock_forward(input_ids, **given)
        self._check_mode()
        _check_arguments(input_ids, images, given, self.model.config)
        if state is not None and state.first_layers != self.layers:
            raise ValueError(
                "past_key_values was filled under another reduction; pass the whole chat without a cache"
            )
        assert input_ids is not None
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is None:
            attention_mask = input_ids.new_ones((len(input_ids), seen + input_ids.shape[1]))
        if attention_mask.shape[1] != seen + input_ids.shape[1]:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns; allowed: {seen + input_ids.shape[1]}, for the "
                "tokens in the cache and those of input_ids"
            )
        embeddings: Tensor = self.model.get_input_embeddings()(input_ids)
        mask = attention_mask.bool().to(embeddings.device)
        if images and self.encoder.reads_question:
            images = self._encoded(images, input_ids, mask[:, seen:])
        if not images:
            assert state is not None
            hidden, *_ = self._run(embeddings, mask[:, seen:], state, None, given, input_ids.shape[1])
            return self._output(hidden, images, given)
        batch = Batch.of(input_ids, mask[:, seen:], images, self.model.config.image_token_id)
        plans = self._plans(batch, seen)
        if state is None and not plans and all(len(image.tokens) == len(image) for image in images):
            self._note(batch, images, plans, None)
            tokens: Any = [image.tokens for image in images]
            features = BaseModelOutputWithPooling(pooler_output=tokens)
            return self.stock_forward(input_ids, mm_encoder_outputs={"image": features}, **given)
        if state is None:
            if given["past_key_values"] is None and self._caches(given):
                given["past_key_values"] = DynamicCache(config=self.model.language_model.config)
            state = CacheState.begin(given["past_key_values"], self.layers, mask[:, :seen])
        rows = embeddings[torch.from_numpy(batch.enters).to(embeddings.device)]
        rows[batch.image_rows().to(rows.device)] = torch.cat([image.tokens for image in images]).to(rows)
        hidden, valid, origin = self._run(
            *padded(rows, batch.counts), state, plans, given, input_ids.shape[1]
        )
        self._note(batch, images, plans, origin)
        return self._output(spread(hidden[valid], origin, batch), images, given)

    def _encoded(self, images: Sequence[Any], input_ids: Tensor, mask: Tensor) -> list[ImageTokens]:
        """Encode images, whose prompts are known now."""
        config = self.model.config
        text, special = config.get_text_config(), []
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(text, name, None)
            special += value if isinstance(value, list) else [] if value is None else [value]
        questions = questions_about(
            images, input_ids, mask.to(input_ids.device), config.image_token_id, special
        )
        return self.encoder.encode_postponed(images, questions)

    def _run(
        self,
        hidden: Tensor,
        valid: Tensor,
        state: CacheState,
        plans: list[RequestPlan] | None,
        given: Mapping[str, Any],
        num_seen: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the language model.

        Args:
            hidden: (B, S, D) embeddings, padded on the left.
            valid: (B, S) false where padded.
            state: state of the cache; updated.
            plans: plans of the prompts that are reduced in the decoder.
            given: arguments of the caller.
            num_seen: tokens of the caller that these represent.

        Returns:
            (B, left, D), (B, left) false where padded, and the row that each token had when it entered.
        """
        position = (state.next_position + valid.cumsum(dim=1) - 1).clamp_(min=0)
        cache = given["past_key_values"]
        options = {name: value for name, value in given.items() if name not in NOT_OF_LAYERS}
        if self.decoder is not None:
            result = self.decoder(hidden, valid, position, state.held, cache, plans, **options)
        else:
            held = torch.cat([state.held[0], valid], dim=1)
            output = self.model.language_model(
                inputs_embeds=hidden,
                attention_mask=held.to(torch.int64),
                position_ids=position,
                past_key_values=cache,
                use_cache=cache is not None,
                **options,
            )
            origin = torch.arange(int(valid.sum()), device=hidden.device)
            result = Output(output.last_hidden_state, valid, origin, [held])
        state.advance(result.held, valid.sum(dim=1, keepdim=True), num_seen)
        return result.hidden, result.valid, result.origin

    def _plans(self, batch: Batch, seen: int) -> list[RequestPlan] | None:
        """Plans of the prompts in the decoder, None where it leaves all tokens."""
        if self.decoder is None:
            return None
        planner = self.decoder.planner
        plans = [
            planner.plan(count, [(offset, length) for _, offset, length in spans], None)
            for count, spans in zip(batch.counts, batch.spans, strict=True)
        ]
        if not any(plan.reduces for plan in plans):
            return None
        if seen:
            raise ValueError(
                f"past_key_values with {seen} tokens is not allowed with new images: {self.reduction.method} reduces "
                "in the decoder, which must see a prompt whole; pass the whole chat without a cache"
            )
        return plans

    def _note(
        self,
        batch: Batch,
        images: Sequence[ImageTokens],
        plans: list[RequestPlan] | None,
        origin: Tensor | None,
    ) -> None:
        """Update the reduction's counts; `origin` None means that all tokens are left."""
        kept = []
        for start, spans in zip(batch.starts, batch.spans, strict=False):
            for index, offset, count in spans:
                patch = images[index].patch
                if origin is not None:
                    first = start + offset
                    here = origin[(origin >= first) & (origin < first + count)] - first
                    patch = patch[here.to(patch.device)]
                kept.append(patch)
        held: float = sum(len(image.tokens) for image in images)
        if plans:
            held = fmean(
                sum(sum(plan.counts[segment]) for plan in plans) for segment in range(len(self.layers))
            )
        self.reduction.note(sum(len(image) for image in images), held, kept)

    def _output(self, hidden: Tensor, images: Sequence[ImageTokens], given: Mapping[str, Any]) -> Any:
        output = LlavaModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=given["past_key_values"] if self._caches(given) else None,
            image_hidden_states=torch.cat([image.tokens for image in images]) if images else None,
        )
        return output.to_tuple() if given.get("return_dict") is False else output

    def _caches(self, given: Mapping[str, Any]) -> bool:
        use_cache = given.get("use_cache")
        return bool(self.model.language_model.config.use_cache if use_cache is None else use_cache)

    def _check_mode(self) -> None:
        """Refuse training."""
        if self.model.training:
            raise ValueError("a model in training mode is not reduced; call model.eval() first")
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.model.parameters()):
            raise ValueError(
                "gradients are not computed through a reduction; call the model under torch.no_grad()"
            )


def _check_arguments(input_ids: Any, images: Sequence[Any], given: Mapping[str, Any], config: Any) -> None:
    """Refuse what has no meaning where layers have different numbers of tokens."""
    if input_ids is None or given.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds is not allowed while tokens are reduced; allowed: input_ids")
    mask, cache = given["attention_mask"], given["past_key_values"]
    if (mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2)) or getattr(
        cache, "is_compileable", False
    ):
        raise ValueError(
            "a static cache or an attention_mask of four dimensions is not allowed while tokens are reduced; allowed: "
            "cache_implementation='dynamic' and an attention_mask (batch, tokens)"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if given.get(name) or getattr(config, name, False):
            raise ValueError(
                f"{name} = True is not allowed while tokens are reduced: layers have different numbers of tokens"
            )
    if not all(isinstance(image, ImageTokens | PostponedImage) for image in images):
        raise ValueError("mm_encoder_outputs was made without the reduction; pass pixel_values instead")
