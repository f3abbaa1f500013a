package deptest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
)

// maxMethods is how many exported methods a type may declare: with more it is several.
const maxMethods = 25

// TestNoTypeIsEverything fails for a type that does too much.
func TestNoTypeIsEverything(t *testing.T) {
	t.Parallel()
	// The library's entry has a verb for each call of the contract, over the rooms that do
	// the work.
	facades := map[string]bool{"manager.Manager": true}
	counts := map[string]int{}
	files := token.NewFileSet()
	root := filepath.Join("..", "..")
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && path != root && strings.HasPrefix(entry.Name(), "."):
			return fs.SkipDir
		case !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		file, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel(root, filepath.Dir(path))
		for _, declared := range file.Decls {
			if method, ok := declared.(*ast.FuncDecl); ok && method.Recv != nil && method.Name.IsExported() {
				counts[dir+"."+receiver(method.Recv.List[0].Type)]++
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, count := range counts {
		if count > maxMethods && !facades[name] {
			t.Errorf("%s has %d exported methods, more than %d: find the types in it", name, count, maxMethods)
		}
	}
	for name := range facades {
		if counts[name] <= maxMethods {
			t.Errorf("%s has %d exported methods, and needs no exception", name, counts[name])
		}
	}
}

// receiver returns the name of the type that a method is of.
func receiver(of ast.Expr) string {
	switch e := of.(type) {
	case *ast.StarExpr:
		return receiver(e.X)
	case *ast.IndexExpr:
		return receiver(e.X)
	case *ast.Ident:
		return e.Name
	}
	return "?"
}
