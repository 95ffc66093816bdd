// The part of ONNX Runtime's C interface that a custom operator needs. Its headers are in no package registry, and are not
// needed: the interface is a table of function pointers that is only ever appended to. Positions were checked in API
// versions 12 to 29; version 16 brought the calls that return a status, 15 the positions of variadic inputs, 18 outputs in an
// input's memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

struct Api;
struct Status;
struct KernelInfo;
struct KernelContext;
struct Value;
struct ShapeInfo;
struct Domain;
struct SessionOptions;

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

constexpr uint32_t kApiVersion = 18;

enum Position {
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kAttributeFloat = 85,
  kAttributeInt64 = 86,
  kContextInput = 90,
  kContextOutput = 91,
  kReleaseStatus = 93,
  kReleaseShapeInfo = 99,
  kParallelFor = 274,
};

template <class Result, class... Arguments>
Result call(const Api* api, Position position, Arguments... arguments) {
  using Function = Result (*)(Arguments...);
  return reinterpret_cast<Function>(reinterpret_cast<void* const*>(api)[position])(arguments...);
}

// ONNXTensorElementDataType
enum Type : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kBfloat16 = 16 };

// OrtErrorCode
enum Code : int { kInvalidArgument = 2 };

// OrtCustomOpInputOutputCharacteristic
enum Characteristic : int { kRequired = 0, kOptional = 1 };

struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  Type (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  Type (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShape)(const CustomOp*, void*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

}  // namespace ort
