"""The schemas of a .pte file: ExecuTorch's program.fbs, and XNNPACK's schema.fbs inside of it;
and that of a .ptd file, flat_tensor.fbs.

As far as our files need them; field numbers are slots of the flatbuffers.
"""

from __future__ import annotations

from ..flatbuffer import Schema

PROGRAM = Schema(
    identifier=b"ET12",
    root="Program",
    tables={
        "Program": {
            0: ("version", "uint32"),
            1: ("execution_plan", "[ExecutionPlan]"),
            2: ("constant_buffer", "[Buffer]"),
            3: ("backend_delegate_data", "[BackendDelegateInlineData]"),
            4: ("segments", "[DataSegment]"),
            5: ("constant_segment", "SubsegmentOffsets"),
            6: ("mutable_data_segments", "[SubsegmentOffsets]"),
            7: ("named_data", "[NamedData]"),
        },
        "Buffer": {0: ("storage", "bytes")},
        "BackendDelegateInlineData": {0: ("data", "bytes")},
        "DataSegment": {0: ("offset", "uint64"), 1: ("size", "uint64")},
        "SubsegmentOffsets": {0: ("segment_index", "uint32"), 1: ("offsets", "[uint64]")},
        "NamedData": {0: ("key", "string"), 1: ("segment_index", "uint32")},
        "ExecutionPlan": {
            0: ("name", "string"),
            1: ("container_meta_type", "ContainerMetadata"),
            2: ("values", "[EValue]"),
            3: ("inputs", "[int32]"),
            4: ("outputs", "[int32]"),
            5: ("chains", "[Chain]"),
            6: ("operators", "[Operator]"),
            7: ("delegates", "[BackendDelegate]"),
            8: ("non_const_buffer_sizes", "[int64]"),
        },
        "ContainerMetadata": {0: ("encoded_inp_str", "string"), 1: ("encoded_out_str", "string")},
        "EValue": {1: ("val", "KernelTypes")},
        "Null": {},
        "Int": {0: ("int_val", "int64")},
        "Bool": {0: ("bool_val", "bool")},
        "Double": {0: ("double_val", "float64")},
        "IntList": {0: ("items", "[int64]")},
        "Tensor": {
            0: ("scalar_type", "int8"),
            2: ("sizes", "[int32]"),
            3: ("dim_order", "[uint8]"),
            5: ("data_buffer_idx", "uint32"),
            6: ("allocation_info", "AllocationDetails"),
            8: ("shape_dynamism", "int8"),
            9: ("extra_tensor_info", "ExtraTensorInfo"),
        },
        "ExtraTensorInfo": {1: ("fully_qualified_name", "string"), 2: ("location", "int8")},
        "AllocationDetails": {
            0: ("memory_id", "uint32"),
            1: ("memory_offset_low", "uint32"),
            2: ("memory_offset_high", "uint32"),
        },
        "Chain": {
            0: ("inputs", "[int32]"),
            1: ("outputs", "[int32]"),
            2: ("instructions", "[Instruction]"),
        },
        "Instruction": {1: ("instr_args", "InstructionArguments")},
        "KernelCall": {0: ("op_index", "int32"), 1: ("args", "[int32]")},
        "DelegateCall": {0: ("delegate_index", "int32"), 1: ("args", "[int32]")},
        "MoveCall": {0: ("move_from", "int32"), 1: ("move_to", "int32")},
        "JumpFalseCall": {
            0: ("cond_value_index", "int32"),
            1: ("destination_instruction", "int32"),
        },
        "Operator": {0: ("name", "string"), 1: ("overload", "string")},
        "BackendDelegate": {
            0: ("id", "string"),
            1: ("processed", "BackendDelegateDataReference"),
            2: ("compile_specs", "[CompileSpec]"),
        },
        "CompileSpec": {0: ("key", "string"), 1: ("value", "bytes")},
        "BackendDelegateDataReference": {0: ("location", "int8"), 1: ("index", "uint32")},
    },
    unions={
        "KernelTypes": {
            name: name
            for name in (
                *("Null", "Int", "Bool", "Double", "Tensor", "String", "IntList", "DoubleList"),
                *("BoolList", "TensorList", "OptionalTensorList"),
            )
        },
        "InstructionArguments": {
            name: name
            for name in ("KernelCall", "DelegateCall", "MoveCall", "JumpFalseCall", "FreeCall")
        },
    },
)

DATA = Schema(
    identifier=b"FT01",
    root="FlatTensor",
    tables={
        "FlatTensor": {
            0: ("version", "uint32"),
            1: ("segments", "[DataSegment]"),
            2: ("named_data", "[NamedData]"),
        },
        "DataSegment": {0: ("offset", "uint64"), 1: ("size", "uint64")},
        "NamedData": {
            0: ("key", "string"),
            1: ("segment_index", "uint32"),
            2: ("tensor_layout", "TensorLayout"),
        },
        "TensorLayout": {
            0: ("scalar_type", "int8"),
            1: ("sizes", "[int32]"),
            2: ("dim_order", "[uint8]"),
        },
    },
    unions={},
)

_ONE, _TWO = "_XNNNode1x1", "_XNNNode2x1"
_NODES = {
    "XNNAdd": _TWO,
    "XNNFullyConnected": "XNNFullyConnected",
    "XNNSoftmax": _ONE,
    "XNNSigmoid": _ONE,
    "XNNStaticTranspose": "XNNStaticTranspose",
    "XNNClamp": _ONE,
    "XNNConv2d": "_XNNNodeConv",
    "XNNDiv": _TWO,
    "XNNStaticResizeBilinear2D": "XNNStaticResizeBilinear2D",
    "XNNStaticConstantPad": "XNNStaticConstantPad",
    "XNNAvgPooling2d": "_XNNPooling2D",
    "XNNMinimum": _TWO,
    "XNNDepthwiseConv2d": "_XNNNodeConv",
    "XNNMaxPooling2d": "_XNNPooling2D",
    "XNNMultiply": _TWO,
    "XNNSubtract": _TWO,
    "XNNFloor": _ONE,
    "XNNConvert": _ONE,
    "XNNGlobalAvgPooling2d": _ONE,
    "XNNStaticReshape": "XNNStaticReshape",
    "XNNArgMaxPooling2d": "XNNArgMaxPooling2d",
    "XNNSquareRoot": _ONE,
    "XNNCeiling": _ONE,
    "XNNHardswish": _ONE,
    "XNNLeakyReLU": "XNNLeakyReLU",
    "XNNMaximum": _TWO,
    "XNNNegate": _ONE,
    "XNNSquare": _ONE,
    "XNNELU": "XNNELU",
    "XNNAbs": _ONE,
    "XNNPReLU": _TWO,
    "XNNConcatenate2": "_XNNCat",
    "XNNConcatenate3": "_XNNCat",
    "XNNConcatenate4": "_XNNCat",
    "XNNStaticSlice": "XNNStaticSlice",
    "XNNScaledDotProductAttention": "XNNScaledDotProductAttention",
    "XNNBatchMatrixMultiply": _TWO,
    "XNNConcatenate5": "_XNNCat",
    "XNNConvTranspose2d": "_XNNNodeConv",
    "XNNReciprocalSquareRoot": _ONE,
    "XNNLog": _ONE,
    "XNNGelu": _ONE,
    "XNNTanh": _ONE,
}

XNNPACK = Schema(
    identifier=b"XN00",
    root="XNNGraph",
    tables={
        "XNNGraph": {
            0: ("version", "string"),
            1: ("xnodes", "[XNode]"),
            2: ("xvalues", "[XValue]"),
            3: ("num_externs", "uint32"),
            4: ("input_ids", "[uint32]"),
            5: ("output_ids", "[uint32]"),
            8: ("constant_data", "[ConstantDataOffset]"),
        },
        "ConstantDataOffset": {
            0: ("offset", "uint64"),
            1: ("size", "uint64"),
            2: ("named_key", "string"),
        },
        "XNode": {1: ("xnode_union", "XNodeUnion"), 2: ("debug_handle", "uint32")},
        "XValue": {1: ("xvalue_union", "XValueUnion")},
        "XNNTensorValue": {
            0: ("datatype", "int16"),
            1: ("num_dims", "uint32"),
            2: ("dims", "[uint32]"),
            3: ("constant_buffer_idx", "uint32"),
            4: ("external_id", "uint32"),
            5: ("flags", "uint32"),
            6: ("id_out", "uint32"),
        },
        "XNNQuantizedTensorValue": {
            0: ("tensor_value", "XNNTensorValue"),
            2: ("quant_params", "XNNQuantParams"),
        },
        "PerChannelQuant": {
            0: ("scale", "[float32]"),
            1: ("channel_dim", "int32"),
            2: ("scale_buffer_idx", "uint32"),
            3: ("num_scales", "uint32"),
        },
        "PerTokenDynamicQuant": {0: ("num_nonbatch_dims", "int32")},
        "PerChannelGroupQuant": {
            0: ("scale", "[float32]"),
            1: ("channel_dim", "int32"),
            2: ("group_size", "int32"),
            4: ("scale_buffer_idx", "uint32"),
            5: ("num_scales", "uint32"),
        },
        _ONE: {0: ("input_id", "uint32"), 1: ("output_id", "uint32"), 2: ("flags", "uint32")},
        _TWO: {
            0: ("input1_id", "uint32"),
            1: ("input2_id", "uint32"),
            2: ("output_id", "uint32"),
            3: ("flags", "uint32"),
        },
        "_XNNCat": {
            0: ("axis", "uint32"),
            1: ("input1_id", "uint32"),
            2: ("input2_id", "uint32"),
            3: ("input3_id", "uint32"),
            4: ("input4_id", "uint32"),
            5: ("output_id", "uint32"),
            6: ("flags", "uint32"),
        },
        "XNNFullyConnected": {
            0: ("input1_id", "uint32"),
            1: ("filter_id", "uint32"),
            2: ("bias_id", "uint32"),
            3: ("output_id", "uint32"),
            4: ("flags", "uint32"),
        },
        "XNNStaticTranspose": {
            0: ("num_dims", "uint32"),
            1: ("perm", "[uint32]"),
            2: ("input_id", "uint32"),
            3: ("output_id", "uint32"),
            4: ("flags", "uint32"),
        },
        "XNNStaticReshape": {
            0: ("num_dims", "uint32"),
            1: ("new_shape", "[uint32]"),
            2: ("input_id", "uint32"),
            3: ("output_id", "uint32"),
            4: ("flags", "uint32"),
        },
        "XNNStaticSlice": {
            0: ("num_dims", "uint32"),
            1: ("offsets", "[uint32]"),
            2: ("sizes", "[uint32]"),
            3: ("input_id", "uint32"),
            4: ("output_id", "uint32"),
            5: ("flags", "uint32"),
        },
    },
    unions={
        "XNodeUnion": _NODES,
        "XValueUnion": {name: name for name in ("XNNTensorValue", "XNNQuantizedTensorValue")},
        "XNNQuantParams": {
            name: name
            for name in (
                *("PerChannelQuant", "PerTensorQuant", "PerTokenDynamicQuant"),
                "PerChannelGroupQuant",
            )
        },
    },
)
