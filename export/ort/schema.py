"""The schema of the ORT format: onnxruntime's ort.fbs, as far as our files need it."""

from __future__ import annotations

from ..flatbuffer import Schema

_TABLES: dict[str, dict[int, tuple[str, str]]] = {
    "InferenceSession": {
        0: ("ort_version", "string"),
        1: ("model", "Model"),
        3: ("kernel_type_str_resolver", "KernelTypeStrResolver"),
    },
    "Model": {
        0: ("ir_version", "int64"),
        1: ("opset_import", "{OperatorSetId}"),
        2: ("producer_name", "string"),
        3: ("producer_version", "string"),
        4: ("domain", "string"),
        5: ("model_version", "int64"),
        6: ("doc_string", "string"),
        7: ("graph", "Graph"),
        8: ("graph_doc_string", "string"),
        9: ("metadata_props", "{StringStringEntry}"),
    },
    "OperatorSetId": {0: ("domain", "string"), 1: ("version", "int64")},
    "StringStringEntry": {0: ("key", "string"), 1: ("value", "string")},
    "Graph": {
        0: ("initializers", "{Tensor}"),
        1: ("node_args", "{ValueInfo}"),
        2: ("nodes", "[Node]"),
        3: ("max_node_index", "uint32"),
        4: ("node_edges", "{NodeEdge}"),
        5: ("inputs", "[string]"),
        6: ("outputs", "[string]"),
        7: ("sparse_initializers", "{SparseTensor}"),
    },
    "SparseTensor": {},
    "Tensor": {
        0: ("name", "string"),
        1: ("doc_string", "string"),
        2: ("dims", "[int64]"),
        3: ("data_type", "int32"),
        4: ("raw_data", "bytes"),
    },
    "ValueInfo": {0: ("name", "string"), 1: ("doc_string", "string"), 2: ("type", "TypeInfo")},
    # A union in ort.fbs; only tensors occur here.
    "TypeInfo": {
        0: ("denotation", "string"),
        1: ("value_type", "uint8"),
        2: ("value", "TensorTypeAndShape"),
    },
    "TensorTypeAndShape": {0: ("elem_type", "int32"), 1: ("shape", "Shape")},
    "Shape": {0: ("dim", "[Dimension]")},
    "Dimension": {0: ("value", "DimensionValue"), 1: ("denotation", "string")},
    "DimensionValue": {
        0: ("dim_type", "int8"),
        1: ("dim_value", "int64"),
        2: ("dim_param", "string"),
    },
    "Node": {
        0: ("name", "string"),
        1: ("doc_string", "string"),
        2: ("domain", "string"),
        3: ("since_version", "int32"),
        4: ("index", "uint32"),
        5: ("op_type", "string"),
        6: ("type", "int32"),
        7: ("execution_provider_type", "string"),
        8: ("inputs", "[string]"),
        9: ("outputs", "[string]"),
        10: ("attributes", "{Attribute}"),
        11: ("input_arg_counts", "[int32]"),
        12: ("implicit_inputs", "[string]"),
    },
    "Attribute": {
        0: ("name", "string"),
        1: ("doc_string", "string"),
        2: ("type", "int32"),
        3: ("f", "float32"),
        4: ("i", "int64"),
        5: ("s", "string"),
        8: ("floats", "[float32]"),
        9: ("ints", "[int64]"),
        10: ("strings", "[string]"),
    },
    "NodeEdge": {
        0: ("node_index", "uint32"),
        1: ("input_edges", "{edge}"),
        2: ("output_edges", "{edge}"),
    },
    "KernelTypeStrResolver": {0: ("op_kernel_type_str_args", "{OpIdKernelTypeStrArgsEntry}")},
    "OpIdKernelTypeStrArgsEntry": {
        0: ("op_id", "string"),
        1: ("kernel_type_str_args", "{KernelTypeStrArgsEntry}"),
    },
    "KernelTypeStrArgsEntry": {
        0: ("kernel_type_str", "string"),
        1: ("args", "[ArgTypeAndIndex]"),
    },
    "ArgTypeAndIndex": {0: ("arg_type", "int8"), 1: ("index", "uint32")},
}
SCHEMA = Schema(
    identifier=b"ORTM",
    root="InferenceSession",
    tables=_TABLES,
    structs={"edge": 12},  # node_index, src_arg_index, dst_arg_index
)
