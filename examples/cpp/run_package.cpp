// Runs an AOTInductor package without Python.
//
//   run_package MODEL.pt2 INPUTS.pt OUTPUTS.pt
//
// MODEL.pt2: torch._inductor.aoti_compile_and_package. INPUTS.pt: torch.save of a list of tensors.
// Writes the list of outputs, for torch.load.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/serialize.h>

#include <fstream>
#include <iostream>
#include <iterator>

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: run_package MODEL.pt2 INPUTS.pt OUTPUTS.pt\n";
    return 2;
  }
  std::ifstream file(argv[2], std::ios::binary);
  TORCH_CHECK(file, "cannot read ", argv[2]);
  const c10::IValue list = torch::pickle_load({std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()});
  std::vector<at::Tensor> inputs;
  for (const c10::IValue& item : list.toListRef()) inputs.push_back(item.toTensor());

  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const std::vector<at::Tensor> outputs = model.run(inputs);
  const std::vector<char> bytes = torch::pickle_save(outputs);
  std::ofstream(argv[3], std::ios::binary).write(bytes.data(), bytes.size());
  std::cout << outputs.size() << " outputs\n";
}
