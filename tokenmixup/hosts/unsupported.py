"""Model classes that people are likely to try and that TokenMixup cannot take, with the reason."""

_STAGES = "it merges tokens from stage to stage, so that no token grid lasts through its layers"
_WINDOWS = f"it attends within windows, and {_STAGES.removeprefix('it ')}"
_CONVOLUTIONS = "it is a convolutional network: it has no tokens and no attention map"
_HYBRID = "most of its layers are convolutions, and its token grid shrinks from stage to stage"
_WRAPPED = (
    "it wraps the model: attach TokenMixup to the model itself first, then wrap what attach returns"
)

_REPLICATED = (
    "it runs copies of the model that share the hooks of the original: use "
    "DistributedDataParallel, also on one machine"
)

REASONS: dict[str, str] = {
    "timm.models.swin_transformer.SwinTransformer": _WINDOWS,
    "timm.models.swin_transformer_v2.SwinTransformerV2": _WINDOWS,
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2Cr": _WINDOWS,
    "timm.models.maxxvit.MaxxVit": _WINDOWS,
    "timm.models.hiera.Hiera": _STAGES,
    "timm.models.levit.Levit": _STAGES,
    "timm.models.pit.PoolingVisionTransformer": _STAGES,
    "timm.models.pvt_v2.PyramidVisionTransformerV2": _STAGES,
    "timm.models.twins.Twins": _WINDOWS,
    "timm.models.volo.VOLO": (
        "its first stage attends to neighbourhoods (outlook attention), and it merges tokens "
        "between its stages: no token grid with one attention map lasts through its layers"
    ),
    "timm.models.mvitv2.MultiScaleVit": (
        f"{_STAGES}, and its attention pools keys, which then belong to no single token"
    ),
    "timm.models.xcit.Xcit": (
        "it attends over channels (cross-covariance attention): there is no attention map over "
        "tokens, hence no saliency"
    ),
    "timm.models.davit.DaVit": (
        "it attends over channels and within windows: there is no attention map over all tokens"
    ),
    "timm.models.cait.Cait": (
        "its heads exchange their attention maps before and after the softmax (talking heads), so "
        "that a row is no distribution over the tokens, and its class token joins after the layers "
        "that could be mixed"
    ),
    "timm.models.vision_transformer_relpos.VisionTransformerRelPos": (
        "its relative-position bias has no place for remembered tokens"
    ),
    "timm.models.vision_transformer_sam.VisionTransformerSAM": (
        "it attends within windows, and keeps its tokens in two-dimensional grids"
    ),
    "timm.models.naflexvit.NaFlexVit": (
        "its images have sequences of different grids, so that the n-th tokens of two images come "
        "from different places; TokenMixup exchanges tokens of one place"
    ),
    "timm.models.resnet.ResNet": _CONVOLUTIONS,
    "timm.models.convnext.ConvNeXt": _CONVOLUTIONS,
    "timm.models.efficientnet.EfficientNet": _CONVOLUTIONS,
    "timm.models.mobilenetv3.MobileNetV3": _CONVOLUTIONS,
    "timm.models.regnet.RegNet": _CONVOLUTIONS,
    "timm.models.vgg.VGG": _CONVOLUTIONS,
    "timm.models.densenet.DenseNet": _CONVOLUTIONS,
    "timm.models.metaformer.MetaFormer": _HYBRID,
    "timm.models.coat.CoaT": _HYBRID,
    "timm.models.byobnet.ByobNet": _HYBRID,
    "torchvision.models.swin_transformer.SwinTransformer": _WINDOWS,
    "torchvision.models.maxvit.MaxVit": _WINDOWS,
    "torchvision.models.resnet.ResNet": _CONVOLUTIONS,
    "torchvision.models.convnext.ConvNeXt": _CONVOLUTIONS,
    "torchvision.models.efficientnet.EfficientNet": _CONVOLUTIONS,
    "torchvision.models.mobilenetv3.MobileNetV3": _CONVOLUTIONS,
    "torchvision.models.regnet.RegNet": _CONVOLUTIONS,
    "torchvision.models.vgg.VGG": _CONVOLUTIONS,
    "torchvision.models.densenet.DenseNet": _CONVOLUTIONS,
    "transformers.models.swin.modeling_swin.SwinForImageClassification": _WINDOWS,
    "transformers.models.swinv2.modeling_swinv2.Swinv2ForImageClassification": _WINDOWS,
    "transformers.models.levit.modeling_levit.LevitForImageClassification": _STAGES,
    "transformers.models.resnet.modeling_resnet.ResNetForImageClassification": _CONVOLUTIONS,
    "transformers.models.convnext.modeling_convnext.ConvNextForImageClassification": _CONVOLUTIONS,
    "transformers.models.vit.modeling_vit.ViTModel": "it has no classifier: take the "
    "ViTForImageClassification around it",
    "torch._dynamo.eval_frame.OptimizedModule": _WRAPPED,
    "torch.nn.parallel.distributed.DistributedDataParallel": _WRAPPED,
    "torch.nn.parallel.data_parallel.DataParallel": _REPLICATED,
}
"""By full name of the class; subclasses are meant as well."""
