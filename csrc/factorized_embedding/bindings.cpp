// factorized_embedding: the Python door, addresses and numbers to the params structs.
// Previous hop: magvit_fast/ops/factorized_embedding.py.
// Next hop: factorized_embedding.h (cpu.cpp or cuda.cu).
#include <pybind11/pybind11.h>

#include "factorized_embedding/factorized_embedding.h"

namespace magvit_fast {
namespace {

using Address = std::uintptr_t;

FactorizedEmbeddingParams params_of(Address ids, Address mask, index_t positions, index_t dim,
                                    int groups, int bits, int dtype) {
  return {reinterpret_cast<const std::int64_t*>(ids),
          reinterpret_cast<const std::uint8_t*>(mask),
          positions,
          dim,
          groups,
          bits,
          static_cast<DType>(dtype)};
}

}  // namespace

void bind_factorized_embedding(pybind11::module_& m) {
  const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
  m.def("factorized_embedding_workspace_bytes",
        [](index_t positions, index_t dim, int groups, int bits, int dtype, long long where,
           unsigned long long how) {
          return backend::factorized_embedding_workspace_bytes(
              params_of(0, 0, positions, dim, groups, bits, dtype), make_context(where, how));
        });
  m.def(
      "factorized_embedding_forward",
      [](Address ids, Address mask, index_t positions, index_t dim, int groups, int bits, int dtype,
         Address weight, Address mask_embedding, Address out, Address bad, long long where,
         unsigned long long how) {
        backend::factorized_embedding_forward(
            {params_of(ids, mask, positions, dim, groups, bits, dtype),
             reinterpret_cast<const void*>(weight), reinterpret_cast<const void*>(mask_embedding),
             reinterpret_cast<void*>(out), reinterpret_cast<std::int64_t*>(bad)},
            make_context(where, how));
      },
      no_gil);
  m.def(
      "factorized_embedding_backward",
      [](Address ids, Address mask, index_t positions, index_t dim, int groups, int bits, int dtype,
         Address grad, Address grad_weight, Address grad_mask_embedding, Address workspace,
         long long where, unsigned long long how) {
        backend::factorized_embedding_backward(
            {params_of(ids, mask, positions, dim, groups, bits, dtype),
             reinterpret_cast<const void*>(grad), reinterpret_cast<void*>(grad_weight),
             reinterpret_cast<void*>(grad_mask_embedding), reinterpret_cast<void*>(workspace)},
            make_context(where, how));
      },
      no_gil);
}

}  // namespace magvit_fast
